"""The engine process: continuous batching on llama.cpp, imported by no other package."""
