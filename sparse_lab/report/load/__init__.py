"""What a report is made from: records, plans, published numbers, traces, read from disk."""
