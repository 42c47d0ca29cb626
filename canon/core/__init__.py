"""What the systems share. Nothing here knows any system."""
