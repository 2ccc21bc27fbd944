"""The run database: vocabulary, schema, store, queries and transfer."""
