//! block_table
