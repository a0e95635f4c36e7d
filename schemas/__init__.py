"""What an agent sends and gets back: pydantic models, no numpy."""
