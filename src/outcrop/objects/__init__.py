"""The object store: an S3 client, and the embedded S3 server used where none is configured."""
