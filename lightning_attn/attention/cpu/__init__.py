"""What leans on private parts of torch to be fast on CPUs; each file says what happens where these are missing."""
