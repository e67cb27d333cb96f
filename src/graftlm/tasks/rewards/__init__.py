"""What says how good an answer is: built-in functions, a file of functions, an adapter."""
