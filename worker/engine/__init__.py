"""The engine process: continuous batching on llama.cpp. Nothing outside this package imports llama_cpp."""
