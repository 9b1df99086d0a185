"""The HTTP side: OpenAI dialects in, frames from workers out."""
