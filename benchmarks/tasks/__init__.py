"""What is learned: each file makes a `Problem` of data, a network and the length of a run."""
