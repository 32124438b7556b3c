"""What data sets of images share: files, folders, transforms, batches, and the base of their DataModules."""
