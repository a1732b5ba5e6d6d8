"""`qjax tune`: which configuration of a kernel is the fastest at which size."""
