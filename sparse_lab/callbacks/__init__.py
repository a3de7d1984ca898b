"""What happens while training, one behaviour a file. The only place where Lightning meets masks."""
