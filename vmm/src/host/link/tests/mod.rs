//! Tests over real sockets.

mod plain;
