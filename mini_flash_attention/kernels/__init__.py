"""When it is computed: a schedule in each folder. Imported when first needed, because Triton is."""
