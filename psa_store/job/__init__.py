"""What a job is: its fixed facts, its layout, its mode, its samples. Pure."""
