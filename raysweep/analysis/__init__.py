"""From records to tables, rankings and the report."""
