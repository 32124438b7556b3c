"""The report of studies: one HTML page, tables as CSV and plots, made from what the runs left behind. Without torch."""
