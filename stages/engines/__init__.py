"""Language models that answer prompts: transformers and vLLM behind one interface."""
