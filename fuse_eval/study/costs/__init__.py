"""What a study will take: bytes, GPU-hours and money, before anything is made."""
