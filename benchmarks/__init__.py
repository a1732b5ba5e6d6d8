"""qjax against its peers. Run from the root of the repository; see README.md here."""
