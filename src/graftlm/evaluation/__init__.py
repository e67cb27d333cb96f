"""What a run did, with intervals, and the page that says it."""
