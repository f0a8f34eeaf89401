"""The demonstration: pictures become clips, clips become memories, and a page shows and measures what they draw."""
