"""`engram eval` for what diffusers draws: identity, consistency, prompt adherence and locality, base against engram."""
