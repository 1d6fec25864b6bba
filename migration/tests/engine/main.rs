//! Whole migrations, both sides in this process, over fakes of everything else.

mod cancel;
mod check;
mod devices;
mod distance;
mod failures;
mod faults;
mod good;
mod live;
mod mend;
mod parts;
mod postcopy;
mod relink;
mod timeout;
mod world;
