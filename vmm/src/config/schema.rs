//! Schemas of types that are text in TOML and JSON.

/// Describes `$kind` as a string with an example.
macro_rules! text_schema {
    ($kind:ty, $example:literal) => {
        impl utoipa::PartialSchema for $kind {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .examples([$example])
                    .into()
            }
        }

        impl utoipa::ToSchema for $kind {}
    };
}

pub(super) use text_schema;
