//! prefix_cache
