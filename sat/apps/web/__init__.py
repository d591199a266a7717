"""One model for many people: a queue, a web page and an HTTP API on the same process."""
