"""Chats in any published shape: read into one form, cut into responses."""
