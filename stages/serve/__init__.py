"""A tuned model in use: a server that speaks OpenAI's interface, and a chat in the terminal."""
