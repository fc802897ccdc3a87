"""Where files live: the S3 client and the embedded object store."""
