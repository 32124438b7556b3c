"""What is compared with: other projects' modules, and plain ways of doing the same."""
