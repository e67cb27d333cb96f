"""What can be learnt: for each task its data, its batches, its loss, and what is measured."""
