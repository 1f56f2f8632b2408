"""When it is computed: one schedule a file. Imported when first needed, because Triton is."""
