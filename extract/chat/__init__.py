"""Read chats of any published format into one form, and split them into responses."""
