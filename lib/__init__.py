"""What the four scripts share. Start with decode.py; each file opens with what it is for."""
