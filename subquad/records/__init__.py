"""What was measured, as files: the schema of a record, the folder of records and the questions asked of them."""
