//! A receiver against a scripted broker: the output, the acknowledgements, and the alerts.

mod acknowledgements;
mod harness;
mod limits;
mod losses;
mod output;
mod reconnects;
mod status;
mod streams;
