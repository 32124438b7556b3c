"""Code that uses private parts of torch to be fast on CPUs; each file names its fallback where these are missing."""
