"""What the scripts share that draw pictures."""
