"""What learning needs, whoever learns: data, the descent, lent weights, readings of prompts."""
