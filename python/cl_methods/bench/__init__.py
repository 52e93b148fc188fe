"""A record of throughput: suites of measurements beside public procedures, their history, and what became worse."""
