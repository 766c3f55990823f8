"""One process's LLM engine: paged KV pool, scheduler, model runner, models, sampler. It knows no network."""
