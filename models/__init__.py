"""The three networks, one file each; ``blocks`` holds what they share."""
