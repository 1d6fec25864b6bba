//! What a refused request answers.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

pub(crate) use crate::causes::chain;
use crate::machine::CommandError;

/// Body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ErrorBody {
    /// What went wrong, for people: the whole chain of causes.
    pub error: String,
}

/// A refused request.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    message: String,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }
}

impl From<CommandError> for ApiError {
    fn from(error: CommandError) -> Self {
        let status = match error {
            CommandError::Rejected(_)
            | CommandError::Waiting
            | CommandError::Migrating
            | CommandError::TakingSnapshot
            | CommandError::Adding
            | CommandError::Closing(_)
            | CommandError::Loading
            | CommandError::Assign(_)
            | CommandError::Bus(_)
            | CommandError::NotRemovable(_)
            | CommandError::PagesMissing
            | CommandError::PagesCut
            | CommandError::InDoubt
            | CommandError::Disks(_) => StatusCode::CONFLICT,
            CommandError::NoDevice(_)
            | CommandError::UnknownDevice(_)
            | CommandError::NoMigration => StatusCode::NOT_FOUND,
            CommandError::Balloon(_)
            | CommandError::InvalidDevice(_)
            | CommandError::InvalidMigration(_)
            | CommandError::InvalidSnapshot(_) => StatusCode::BAD_REQUEST,
            CommandError::Ended => StatusCode::GONE,
            CommandError::Machine(_) | CommandError::Thread(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, chain(&error))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: self.message,
        };
        (self.status, Json(body)).into_response()
    }
}
