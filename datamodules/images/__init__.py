"""Image data of any task: files, folders, transforms, batches, and the base of the DataModules."""
