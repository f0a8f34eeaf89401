"""`engram eval` for clips: identity, temporal consistency, prompt adherence and locality, base against engram."""
