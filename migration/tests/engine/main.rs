//! Whole migrations, both sides in this process, over fakes of everything else.

mod cancel;
mod distance;
mod failures;
mod faults;
mod good;
mod live;
mod mend;
mod postcopy;
mod relink;
mod timeout;
mod world;
