"""What keeps the book and the package one: tangling, syncing, agreement."""
