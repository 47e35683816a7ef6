"""ACC, ASR, RA, their intervals, and the verdict on a claim."""
