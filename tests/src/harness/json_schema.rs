//! Whether a JSON value is what an OpenAPI 3.1 document says.
//!
//! Knows the part of JSON Schema that the document uses, and refuses what it does not know, so that
//! nothing passes unchecked. An object must not have fields that the document does not describe.

use std::collections::BTreeSet;

use serde_json::Value;

/// Keywords that describe and do not restrict.
const ANNOTATIONS: [&str; 5] = ["description", "title", "example", "examples", "default"];
/// Keywords that are checked here, or by the one beside them.
const KEYWORDS: [&str; 13] = [
    "$ref",
    "additionalProperties",
    "allOf",
    "const",
    "enum",
    "format",
    "items",
    "minimum",
    "oneOf",
    "properties",
    "propertyNames",
    "required",
    "type",
];

/// What is wrong with `value` by `schema`, a part of `document`; empty when nothing is.
#[must_use]
pub fn check(document: &Value, schema: &Value, value: &Value) -> Vec<String> {
    let mut checker = Checker {
        document,
        errors: Vec::new(),
    };
    checker.whole(schema, value, "$");
    checker.errors
}

struct Checker<'a> {
    document: &'a Value,
    errors: Vec<String>,
}

impl<'a> Checker<'a> {
    /// A value that `schema` describes completely.
    fn whole(&mut self, schema: &'a Value, value: &Value, at: &str) {
        self.part(schema, value, at);
        let mut known = BTreeSet::new();
        if let (Some(fields), true) = (value.as_object(), self.fields(schema, &mut known)) {
            let unknown = fields.keys().filter(|key| !known.contains(key.as_str()));
            let errors = unknown.map(|key| format!("{at}.{key} is not described"));
            self.errors.extend(errors);
        }
    }

    /// Collects the fields that `schema` describes; false when it allows others.
    fn fields(&self, schema: &'a Value, known: &mut BTreeSet<&'a str>) -> bool {
        if let Some(target) = self.target(schema) {
            return self.fields(target, known);
        }
        let own = schema["properties"].as_object();
        known.extend(own.into_iter().flatten().map(|(name, _)| name.as_str()));
        let parts = ["allOf", "oneOf"].into_iter();
        let parts: Vec<_> = parts
            .filter_map(|list| schema[list].as_array())
            .flatten()
            .collect();
        let closed = parts.into_iter().all(|part| self.fields(part, known));
        closed && schema.get("additionalProperties").is_none()
    }

    fn target(&self, schema: &Value) -> Option<&'a Value> {
        let reference = schema["$ref"].as_str()?;
        self.document.pointer(reference.strip_prefix('#')?)
    }

    fn part(&mut self, schema: &'a Value, value: &Value, at: &str) {
        let Some(keywords) = schema.as_object() else {
            return self.error(at, "the document has no schema");
        };
        for keyword in keywords.keys().map(String::as_str) {
            if !KEYWORDS.contains(&keyword) && !ANNOTATIONS.contains(&keyword) {
                self.error(at, &format!("the checker does not know {keyword}"));
            }
        }
        if schema.get("$ref").is_some() {
            match self.target(schema) {
                Some(target) => self.part(target, value, at),
                None => self.error(at, &format!("{} leads nowhere", schema["$ref"])),
            }
        }
        self.check_type(schema, value, at);
        self.check_combinations(schema, value, at);
        self.check_fields(schema, value, at);
        if let (Some(items), Some(list)) = (schema.get("items"), value.as_array()) {
            for (item, index) in list.iter().zip(0..) {
                self.whole(items, item, &format!("{at}[{index}]"));
            }
        }
    }

    fn check_type(&mut self, schema: &Value, value: &Value, at: &str) {
        let allowed: Vec<&str> = match schema.get("type") {
            None => return self.check_values(schema, value, at),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            Some(one) => one.as_str().into_iter().collect(),
        };
        let is = |kind: &&str| match *kind {
            "null" => value.is_null(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "string" => value.is_string(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            _ => false,
        };
        if !allowed.iter().any(is) {
            self.error(at, &format!("{value} is not of type {allowed:?}"));
        }
        self.check_values(schema, value, at);
    }

    fn check_values(&mut self, schema: &Value, value: &Value, at: &str) {
        if let Some(list) = schema["enum"].as_array()
            && !list.contains(value)
        {
            self.error(at, &format!("{value} is not one of {list:?}"));
        }
        if let Some(wanted) = schema.get("const")
            && wanted != value
        {
            self.error(at, &format!("{value} is not {wanted}"));
        }
        if let (Some(least), Some(number)) = (schema["minimum"].as_f64(), value.as_f64())
            && number < least
        {
            self.error(at, &format!("{number} is less than {least}"));
        }
    }

    fn check_combinations(&mut self, schema: &'a Value, value: &Value, at: &str) {
        for part in schema["allOf"].as_array().into_iter().flatten() {
            self.part(part, value, at);
        }
        let Some(choices) = schema["oneOf"].as_array() else {
            return;
        };
        let fits = |choice: &&Value| {
            let mut checker = Checker {
                document: self.document,
                errors: Vec::new(),
            };
            checker.part(choice, value, at);
            checker.errors.is_empty()
        };
        let fitting = choices.iter().filter(fits).count();
        if fitting != 1 {
            let count = choices.len();
            self.error(at, &format!("{value} fits {fitting} of {count} choices"));
        }
    }

    fn check_fields(&mut self, schema: &'a Value, value: &Value, at: &str) {
        let Some(fields) = value.as_object() else {
            return;
        };
        for name in schema["required"].as_array().into_iter().flatten() {
            let name = name.as_str().unwrap_or_default();
            if !fields.contains_key(name) {
                self.error(at, &format!("{name} is missing"));
            }
        }
        for (name, part) in schema["properties"].as_object().into_iter().flatten() {
            if let Some(field) = fields.get(name) {
                self.whole(part, field, &format!("{at}.{name}"));
            }
        }
    }

    fn error(&mut self, at: &str, what: &str) {
        self.errors.push(format!("{at}: {what}"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document() -> Value {
        json!({"schemas": {
            "Kind": {"oneOf": [
                {"type": "object", "required": ["event"],
                 "properties": {"event": {"type": "string", "enum": ["a"]}}},
                {"type": "object", "required": ["event", "n"],
                 "properties": {"event": {"type": "string", "enum": ["b"]},
                                "n": {"type": "integer", "minimum": 0}}},
            ]},
            "Event": {"allOf": [
                {"$ref": "#/schemas/Kind"},
                {"type": "object", "required": ["at"],
                 "properties": {"at": {"type": ["integer", "null"]}}},
            ]},
            "List": {"type": "array", "items": {"$ref": "#/schemas/Event"}},
        }})
    }

    fn errors(value: &Value) -> Vec<String> {
        let document = document();
        check(&document, &document["schemas"]["List"], value)
    }

    #[test]
    fn values_as_described_pass() {
        let value = json!([{"event": "a", "at": 1}, {"event": "b", "n": 0, "at": null}]);
        assert_eq!(errors(&value), Vec::<String>::new());
    }

    #[test]
    fn every_deviation_is_found() {
        let cases = [
            (json!({}), "is not of type"),
            (json!([{"event": "a"}]), "$[0]: at is missing"),
            (
                json!([{"event": "a", "at": "x"}]),
                "$[0].at: \"x\" is not of type",
            ),
            (json!([{"event": "c", "at": 1}]), "fits 0 of 2 choices"),
            (
                json!([{"event": "b", "n": -1, "at": 1}]),
                "fits 0 of 2 choices",
            ),
            (
                json!([{"event": "a", "at": 1, "z": 1}]),
                "$[0].z is not described",
            ),
        ];
        for (value, expected) in cases {
            let errors = errors(&value);
            let found = errors.iter().any(|error| error.contains(expected));
            assert!(found, "{value}: {errors:?}");
        }
    }

    #[test]
    fn unknown_keywords_are_not_passed_over() {
        let schema = json!({"type": "string", "pattern": "x"});
        assert_eq!(
            check(&json!({}), &schema, &json!("y")),
            ["$: the checker does not know pattern"]
        );
    }
}
