"""The study: which runs compare, the statistics, the tables and figures of the report."""
