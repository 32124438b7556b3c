"""Downloads of data sets: files fetched, verified and unpacked, and where the official ones are."""
